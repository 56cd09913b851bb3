"""Models for many callers: an HTTP server with a page, and prediction over a Ray cluster. Nothing here needs torch."""
