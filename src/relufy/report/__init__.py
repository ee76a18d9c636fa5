"""Reports: measured data (JSON) to one self-contained HTML page."""
