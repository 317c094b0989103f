"""The steps of a request through the gateway, one file each; pipeline.py puts them in order."""
