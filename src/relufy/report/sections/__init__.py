"""One module for each kind of result: `section(run)` turns a document into tables and figures."""
