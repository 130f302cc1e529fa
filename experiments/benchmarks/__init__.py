"""Side by side against peers, run by hand; each prints one table. Results in RESULTS.md."""
