"""What a site can measure of how much its training gives away: membership, canaries, copies."""
