"""Programs beside the suite: chaos and hostile runs, scale, replay, the bench."""
