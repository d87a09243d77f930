"""The demo `hkd-demo`: runs a detector on an image source and shows or saves the result."""
