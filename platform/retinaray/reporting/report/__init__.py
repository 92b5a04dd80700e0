"""One HTML page about runs: what it holds, how its parts are drawn, how they become a page."""
