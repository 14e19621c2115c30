"""What people look at: HTML pages without scripts, and text that cannot act on a page, a terminal or a spreadsheet."""
