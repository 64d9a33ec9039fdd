"""Reports: records and verdicts as a terminal table, Markdown, a page, CSV and pictures."""
