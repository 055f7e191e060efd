"""What a run found, for people: report.json, report.md and report.html, grids of images, plots."""
