"""The evidence study: do long residuals and the diversity loss make better images? See `__main__`."""
