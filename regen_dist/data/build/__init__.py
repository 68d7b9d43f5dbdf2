"""Making datasets: out of videos, out of tars of others, or drawn."""
