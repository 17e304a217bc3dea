"""Memory: the forecast of a run's peak, its simulator, and the meter."""
