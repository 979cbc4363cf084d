"""More than one process: what ranks tell each other, and a vocabulary that is split over them."""
