"""What every process needs: settings, logs, metrics, lifecycle, membership."""
