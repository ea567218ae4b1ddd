"""A page in the browser to look into finished models: `views.py` computes what it shows, `server.py` speaks HTTP, `page.*` is
the page."""
