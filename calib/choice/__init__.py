"""What each layer costs in each format, and the choice of formats that costs least for its size."""
