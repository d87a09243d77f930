"""`hkd-bench score`: the official figures of detections that lie in files, whoever made them."""
