"""One file a stage; a stage knows neither who runs it nor where data lies."""
