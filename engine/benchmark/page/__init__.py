"""The report as one HTML page: figures by plotly, and nothing that the page would have to fetch. No JAX, no engine."""
