"""Sizes the pools of workers: observation, forecast, required capacity, decision, effect."""
