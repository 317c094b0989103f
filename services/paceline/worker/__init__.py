"""The worker process: hosts a role, joins its event loop to an engine process and a KV node."""
