"""What a run looks like to people: an overview as text, and a page."""
