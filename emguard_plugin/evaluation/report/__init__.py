"""Tables, pages and files for people and other tools, from run folders."""
