"""Many engines behind the door of one server: each is a replica on Ray Serve, and requests are routed to them."""
