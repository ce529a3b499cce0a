// From a folder (file://) a browser may not fetch the pages that a search finds, so the list comes without excerpts.
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
