"""Is it faster here, and with which K: data sets, load, records, advice on K, and a report."""
