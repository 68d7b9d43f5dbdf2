"""What reading costs: each module measures one thing beside what it is compared with. `regen bench data` runs them."""
