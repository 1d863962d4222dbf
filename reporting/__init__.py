"""The report of one run: figures and a page from what the run left in its folder."""
