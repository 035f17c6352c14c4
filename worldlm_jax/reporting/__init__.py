"""The report: from the files of a run or a comparison to one page that explains itself."""
