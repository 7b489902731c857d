"""The search page: type words or drop a picture, see why each hit matched, and steer by its words."""
