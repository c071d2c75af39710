# Cells of R; the protocol: docs/reference/drivers.md. Everything of ours is in this one scope.
local({

nonce <- Sys.getenv("MADANG_NONCE")
Sys.unsetenv(c("MADANG_NONCE", "DRIVER"))
source_of_ops <- file("/dev/fd/3", "rb", raw = TRUE)
out <- file("/dev/fd/1", "wb", raw = TRUE)
err <- file("/dev/fd/2", "wb", raw = TRUE)
cell <- "-"
plots <- file.path(tempdir(), "madang-%d.png")

as_bytes <- function(text) if (is.raw(text)) text else charToRaw(enc2utf8(paste(text, collapse = "\n")))
frame <- function(kind, id, what = "-", payload = "", to = out) {
  payload <- as_bytes(payload)
  head <- sprintf("\x1e%s %s %s %s %d\n", nonce, kind, id, what, length(payload))
  base::flush(stdout())
  writeBin(c(charToRaw(head), payload, charToRaw("\n")), to)
  base::flush(to)
}

read_line <- function() {
  got <- raw(0)
  repeat {
    byte <- readBin(source_of_ops, "raw", 1L)
    if (length(byte) == 0L) quit("no")
    if (byte == as.raw(10L)) return(rawToChar(got))
    got <- c(got, byte)
  }
}
next_op <- function() {
  head <- strsplit(read_line(), " ", fixed = TRUE)[[1L]]
  left <- as.integer(head[3L])
  got <- raw(0)
  while (left > 0L) {
    more <- readBin(source_of_ops, "raw", left)
    if (length(more) == 0L) quit("no")
    got <- c(got, more)
    left <- left - length(more)
  }
  text <- rawToChar(got[got != as.raw(0L)])
  Encoding(text) <- "UTF-8"
  list(op = head[1L], id = head[2L], text = text)
}

# NULL: nobody answers.
ask <- function(prompt = "", secret = FALSE) {
  frame("input", cell, if (secret) "password" else "prompt", prompt)
  repeat {
    got <- next_op()
    if (got$op == "input" && got$id == cell) return(got$text)
    if (got$op == "eof" && got$id == cell) return(NULL)
    if (got$op == "quit") quit("no")
  }
}

# What reads from the terminal or from standard input.
replace_base <- function(name, value, where = baseenv()) {
  unlockBinding(name, where)
  assign(name, value, envir = where)
  lockBinding(name, where)
}
is_stdin <- function(con) {
  identical(con, "stdin") || inherits(con, "connection") &&
    (inherits(con, "terminal") && summary(con)$description == "stdin" || identical(summary(con)$description, "stdin"))
}
replace_base("readline", function(prompt = "") {
  answer <- ask(prompt)
  if (is.null(answer)) "" else answer
})
their_readLines <- base::readLines
replace_base("readLines", function(con = stdin(), n = -1L, ok = TRUE, warn = TRUE, encoding = "unknown", skipNul = FALSE) {
  if (!is_stdin(con)) return(their_readLines(con, n, ok, warn, encoding, skipNul))
  lines <- character()
  while (n < 0L || length(lines) < n) {
    line <- ask()
    if (is.null(line)) break
    lines <- c(lines, line)
  }
  lines
})
their_scan <- base::scan
replace_base("scan", function(file = "", ..., text) {
  if (!missing(text)) return(their_scan(..., text = text))
  if (!identical(file, "") && !is_stdin(file)) return(their_scan(file, ...))
  lines <- character()
  while (!is.null(line <- ask()) && nzchar(line)) lines <- c(lines, line)
  their_scan(..., text = lines)
})

# Plots: what a device has drawn when the cell ends, or when the next page begins.
plotting <- new.env()
options(device = function(...) {
  unlink(Sys.glob(file.path(tempdir(), "madang-*.png")))
  kind <- if (capabilities("cairo")) "cairo" else "Xlib"
  grDevices::png(plots, width = 7, height = 5, units = "in", res = 100, type = kind)
  plotting$device <- grDevices::dev.cur()
})
show_plots <- function(id) {
  if (is.null(plotting$device)) return()
  if (plotting$device %in% grDevices::dev.list()) grDevices::dev.off(plotting$device)
  plotting$device <- NULL
  pictures <- Sys.glob(file.path(tempdir(), "madang-*.png"))
  for (picture in pictures[order(nchar(pictures), pictures)]) {
    size <- file.info(picture)$size
    if (size > 0) frame("display", id, "image/png", readBin(picture, "raw", size))
  }
  unlink(pictures)
}

bundle <- function(kind, id, parts) {
  for (i in seq_along(parts))
    frame(if (i < length(parts)) "part" else kind, id, names(parts)[i], parts[[i]])
}
escape <- function(x) gsub(">", "&gt;", gsub("<", "&lt;", gsub("&", "&amp;", x, fixed = TRUE), fixed = TRUE), fixed = TRUE)
as_html <- function(table) {
  shown <- format(utils::head(table, 100L))
  cells <- vapply(shown, function(column) escape(as.character(column)), character(nrow(shown)))
  cells <- matrix(cells, nrow = nrow(shown))
  rows <- apply(cbind(escape(rownames(shown)), cells), 1L, function(row)
    paste0("<tr><th>", row[1L], "</th>", paste0("<td>", row[-1L], "</td>", collapse = ""), "</tr>"))
  head <- paste0("<tr><th></th>", paste0("<th>", escape(names(table)), "</th>", collapse = ""), "</tr>")
  more <- if (nrow(table) > 100L) sprintf("<p>%d more rows</p>", nrow(table) - 100L) else ""
  paste0("<table>", head, paste0(rows, collapse = ""), "</table>", more)
}
show_value <- function(id, value) {
  # Printing may draw (ggplot2), may print by cat (summaries), and may fail.
  text <- utils::capture.output(if (isS4(value)) methods::show(value) else print(value))
  parts <- list("text/plain" = text)
  if (is.data.frame(value) && nrow(value) > 0L && ncol(value) > 0L)
    parts <- c(list("text/html" = as_html(value)), parts)
  if (length(text) > 0L) bundle("result", id, parts)
}

memory <- function() {
  pages <- tryCatch(suppressWarnings(scan("/proc/self/statm", quiet = TRUE, n = 2L)), error = function(e) c(0, 0))
  pages[2L] * 4096
}

run <- function(id, code) {
  cell <<- id
  frame("begin", id)
  began <- proc.time()
  line <- NULL
  failed <- NULL
  status <- "ok"
  fail <- function(name, text, trace = character()) {
    status <<- "error"
    text <- gsub("\n", " ", text)
    frame("error", id, if (is.null(line)) "-" else line, c(name, text, paste0(name, ": ", text), trace))
  }
  tryCatch({
    parsed <- tryCatch(parse(text = code, keep.source = TRUE, srcfile = srcfilecopy("cell", strsplit(code, "\n", fixed = TRUE)[[1L]])),
      error = function(e) {
        found <- regmatches(conditionMessage(e), regexec("cell:([0-9]+):[0-9]+: (.*)", conditionMessage(e)))[[1L]]
        if (length(found) == 3L) line <<- as.integer(found[2L])
        fail("SyntaxError", if (length(found) == 3L) sub("\n.*", "", found[3L]) else conditionMessage(e), conditionMessage(e))
        NULL
      })
    places <- attr(parsed, "srcref")
    for (i in seq_along(parsed)) {
      line <- as.integer(places[[i]])[1L]
      withCallingHandlers({
        value <- allowInterrupts(withVisible(eval(parsed[[i]], globalenv())))
        if (value$visible) {
          if (i == length(parsed)) show_value(id, value$value) else print(value$value)
        }
      }, error = function(e) {
        steps <- sys.calls()
        for (step in rev(steps)) {
          place <- attr(step, "srcref")
          if (!is.null(place) && identical(attr(place, "srcfile")$filename, "cell")) {
            line <<- as.integer(place)[1L]
            break
          }
        }
        failed <<- vapply(steps, function(step) paste(utils::head(deparse(step), 1L), collapse = ""), "")
      }, warning = function(w) {
        call <- conditionCall(w)
        where <- if (is.null(call) || grepl("^eval\\(parsed", deparse(call)[1L])) "" else paste0(" in ", utils::head(deparse(call), 1L))
        cat("Warning", where, ": ", conditionMessage(w), "\n", sep = "", file = stderr())
        invokeRestart("muffleWarning")
      })
    }
  }, error = function(e) {
    inner <- grep("^(eval|withVisible|withCallingHandlers|tryCatch|doTryCatch|run|\\.handleSimpleError|h\\()|FUN\\(X", failed, invert = TRUE, value = TRUE)
    fail(class(e)[1L], conditionMessage(e), if (length(inner)) c("Calls:", utils::tail(inner, 20L)))
  }, interrupt = function(i) {
    line <<- NULL
    fail("Interrupted", "The cell was interrupted.")
  })
  tryCatch(show_plots(id), error = function(e) fail("PlotError", conditionMessage(e)))
  while (sink.number() > 0L) sink()
  took <- proc.time() - began
  base::flush(stdout())
  frame("fence", id, to = err)
  frame("done", id, status, sprintf("wall_us=%.0f\ncpu_us=%.0f\nmem_bytes=%.0f",
    took[["elapsed"]] * 1e6, sum(took[-3L]) * 1e6, memory()))
}

at_cursor <- function(payload) {
  cut <- regexpr("\n", payload, fixed = TRUE)
  list(cursor = as.integer(substr(payload, 1L, cut - 1L)), code = substring(payload, cut + 1L))
}
complete <- function(id, payload) {
  at <- at_cursor(payload)
  before <- substr(at$code, 1L, at$cursor)
  line <- sub(".*\n", "", before)
  matches <- character()
  word <- ""
  tryCatch({
    utils:::.assignLinebuffer(line)
    utils:::.assignEnd(nchar(line))
    word <- utils:::.guessTokenFromLine()
    utils:::.completeToken()
    matches <- utils:::.retrieveCompletions()
  }, error = function(e) NULL)
  frame("completions", id, paste0(at$cursor - nchar(word), ",", at$cursor), utils::head(matches, 500L))
}
inspect <- function(id, payload) {
  at <- at_cursor(payload)
  before <- regmatches(substr(at$code, 1L, at$cursor), regexpr("[A-Za-z.][A-Za-z0-9._]*$", substr(at$code, 1L, at$cursor)))
  after <- regmatches(substring(at$code, at$cursor + 1L), regexpr("^[A-Za-z0-9._]*", substring(at$code, at$cursor + 1L)))
  word <- paste0(before, after)
  if (length(word) == 0L || !nzchar(word) || !exists(word, envir = globalenv()))
    return(frame("inspection", id, "none"))
  value <- get(word, envir = globalenv())
  text <- utils::capture.output(if (is.function(value)) print(args(value)) else utils::str(value))
  frame("inspection", id, "found", c(paste(class(value)[1L], word), text[text != "NULL"]))
}

options(show.error.locations = TRUE, keep.source = TRUE, warn = 1, digits = 7,
  cli.num_colors = 1L, browser = function(...) NULL)
frame("ready", "-", "-", as.character(getRversion()))
# An interrupt reaches running code alone; one that comes at another time is dropped.
suspendInterrupts(repeat {
  got <- next_op()
  tryCatch(allowInterrupts(Sys.sleep(0)), interrupt = function(i) NULL)
  switch(got$op, run = run(got$id, got$text), complete = complete(got$id, got$text),
    inspect = inspect(got$id, got$text), quit = quit("no"))
})

})
