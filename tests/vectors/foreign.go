// Owns: the archives of tests/vectors/go-*.tar.gz, as Go's archive/tar writes them.
// Made with Go 1.26: go run tests/vectors/foreign.go tests/vectors
package main

import (
	"archive/tar"
	"compress/gzip"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

func check(err error) {
	if err != nil {
		panic(err)
	}
}

func write(path string, format tar.Format) {
	file, err := os.Create(path)
	check(err)
	packed := gzip.NewWriter(file)
	archive := tar.NewWriter(packed)
	moment := time.Unix(1700000000, 0)
	if format == tar.FormatPAX {
		moment = moment.Add(123456789)
	}
	add := func(kind byte, name string, mode int64, link string, data string) {
		header := &tar.Header{
			Typeflag: kind, Name: name, Mode: mode, Linkname: link, Size: int64(len(data)),
			Uid: 1000, Gid: 1000, Uname: "app", Gname: "app", ModTime: moment, Format: format,
		}
		if format == tar.FormatPAX && name == "bin/app" {
			header.PAXRecords = map[string]string{"SCHILY.xattr.security.capability": "\x01\x00"}
		}
		check(archive.WriteHeader(header))
		_, err := archive.Write([]byte(data))
		check(err)
	}
	// As docker export orders and names them: no ./, parents first, a trailing slash or none.
	add(tar.TypeReg, ".dockerenv", 0o755, "", "")
	add(tar.TypeDir, "bin/", 0o755, "", "")
	add(tar.TypeReg, "bin/app", 0o4755, "", strings.Repeat("program\n", 200))
	add(tar.TypeDir, "dev", 0o755, "", "")
	add(tar.TypeReg, "dev/console", 0o600, "", "")
	add(tar.TypeDir, "etc/", 0o755, "", "")
	add(tar.TypeSymlink, "etc/mtab", 0o777, "/proc/mounts", "")
	add(tar.TypeReg, "etc/secret", 0o600, "", "secret")
	add(tar.TypeLink, "etc/again", 0o4755, "bin/app", "")
	add(tar.TypeDir, "tmp/", 0o1777, "", "")
	add(tar.TypeReg, "tmp/left", 0o644, "", "left")
	add(tar.TypeDir, "usr/", 0o755, "", "")
	long := "usr/" + strings.Repeat("directory/", 9) + strings.Repeat("f", 60)
	add(tar.TypeReg, long, 0o644, "", "long")
	if format != tar.FormatUSTAR {
		add(tar.TypeReg, "usr/größe-"+strings.Repeat("ü", 80), 0o644, "", "non-ASCII")
		add(tar.TypeReg, "usr/"+strings.Repeat("l", 250), 0o640, "", "longer")
		add(tar.TypeLink, "usr/hard", 0o644, "usr/"+strings.Repeat("l", 250), "")
		add(tar.TypeSymlink, "usr/soft", 0o777, strings.Repeat("../", 60)+"bin/app", "")
	}
	check(archive.Close())
	check(packed.Close())
	check(file.Close())
	fmt.Println(path)
}

func main() {
	for name, format := range map[string]tar.Format{
		"ustar": tar.FormatUSTAR, "gnu": tar.FormatGNU, "pax": tar.FormatPAX,
	} {
		write(filepath.Join(os.Args[1], "go-"+name+".tar.gz"), format)
	}
}
