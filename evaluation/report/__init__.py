"""Reports of a run's results: report.json, report.md and report.html, grids of images, plots."""
