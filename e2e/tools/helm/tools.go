//go:build tools

// Package tools pins what the end-to-end suites run; it is never built itself.
package tools

import _ "helm.sh/helm/v3/cmd/helm"
