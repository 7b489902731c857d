"""The search page: type a text or drop an image, see why each hit matched, and change the weights of its terms."""
