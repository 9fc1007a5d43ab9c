"""What a step of each method costs beside plain training and beside SAM."""
