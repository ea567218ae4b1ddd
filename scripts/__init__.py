"""The programs: python -m scripts.NAME. They take arguments apart; what they do is in run/."""
