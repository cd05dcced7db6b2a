module outrigger.dev/e2e/tools/pause

go 1.23.8
