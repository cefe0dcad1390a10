"""The report of a run and the comparison of methods: tables, pictures, pages, model cards."""
