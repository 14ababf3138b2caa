"""The report: data, figures, page."""
