"""The wire: frames, codecs between messages and domain values, servers, channels."""
