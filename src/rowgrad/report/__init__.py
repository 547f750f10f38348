"""What an audit leaves behind: the table of scores, the log of the run, and the page."""
