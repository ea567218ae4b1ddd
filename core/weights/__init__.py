"""Weight files: where they are, what is in them, and how official ones become ours."""
