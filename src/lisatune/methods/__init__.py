"""What trains, and where its gradient comes from."""
