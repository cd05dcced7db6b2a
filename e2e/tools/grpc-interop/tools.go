//go:build tools

// Package tools pins what the end-to-end suites run; it is never built itself.
package tools

import (
	_ "google.golang.org/grpc/interop/client"
	_ "google.golang.org/grpc/interop/server"
)
