"""What a plan costs: seconds, bytes and memory, each with the basis it rests on."""
