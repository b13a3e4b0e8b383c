"""A server in front of the engine, with the HTTP interface of OpenAI."""
