"""Parts that check results: against float64, between candidates, between runs."""
