// Cells of PHP 7.4 to 8; the protocol: docs/reference/drivers.md. Runs as `php < this`, so that
// STDIN is ours to define.
namespace Madang {

final class Interrupted extends \Exception {}

final class Wire
{
    public static $nonce, $in, $cell = '-', $running = false, $code, $value, $wall, $cpu;

    public static function frame($kind, $id, $arg = '-', $payload = '')
    {
        while (ob_get_level() > 0) ob_end_flush();
        $head = "\x1e" . self::$nonce . " $kind $id $arg " . strlen($payload);
        self::write(STDOUT, "$head\n$payload\n");
    }

    public static function write($to, $data)
    {
        for ($done = 0; $done < strlen($data); $done += (int) $n) {
            $n = @fwrite($to, substr($data, $done));
            if ($n === false) exit(1);
        }
        fflush($to);
    }

    /** Next operation: name, id, payload. */
    public static function next()
    {
        $head = self::line();
        if (!preg_match('/^(\S+) (\S+) (\d+)$/', $head, $found)) exit(0);
        $left = (int) $found[3];
        $payload = '';
        while ($left > 0) {
            $more = @fread(self::$in, min($left, 65536));
            if ($more === false || $more === '') {
                if (feof(self::$in)) exit(0);
                self::signals();
                continue;
            }
            $payload .= $more;
            $left -= strlen($more);
        }
        return [$found[1], $found[2], $payload];
    }

    private static function line()
    {
        $line = '';
        while (substr($line, -1) !== "\n") {
            $more = @fgets(self::$in);
            if ($more === false) {
                if (feof(self::$in)) exit(0);
                self::signals();
                continue;
            }
            $line .= $more;
        }
        return rtrim($line, "\n");
    }

    private static function signals()
    {
        if (function_exists('pcntl_signal_dispatch')) pcntl_signal_dispatch();
    }

    public static function ask($prompt)
    {
        self::frame('input', self::$cell, 'prompt', $prompt);
        while (true) {
            [$op, $id, $payload] = self::next();
            if ($op === 'input' && $id === self::$cell) return $payload;
            if ($op === 'eof' && $id === self::$cell) return false;
            if ($op === 'quit') exit(0);
        }
    }

    private static function figures()
    {
        $memory = explode(' ', (string) @file_get_contents('/proc/self/statm'));
        return sprintf("wall_us=%d\ncpu_us=%d\nmem_bytes=%d", (hrtime(true) - self::$wall) / 1000,
            self::cpu() - self::$cpu, ((int) ($memory[1] ?? 0)) * 4096);
    }

    public static function cpu()
    {
        $usage = getrusage();
        return ($usage['ru_utime.tv_sec'] + $usage['ru_stime.tv_sec']) * 1000000
            + $usage['ru_utime.tv_usec'] + $usage['ru_stime.tv_usec'];
    }

    public static function error($id, $name, $text, $line, $trace = '')
    {
        $text = str_replace("\n", ' ', $text);
        $where = $line === null ? '' : "cell:$line: ";
        $payload = "$name\n$text\n$where$name: $text" . ($trace === '' ? '' : "\n$trace");
        self::frame('error', $id, $line ?? '-', $payload);
    }

    public static function done($id, $status)
    {
        self::$running = false;
        while (ob_get_level() > 0) ob_end_flush();
        self::write(STDERR, "\x1e" . self::$nonce . " fence $id - 0\n\n");
        self::frame('done', $id, $status, self::figures());
    }
}

/** What `STDIN` and `php://stdin` are: each line that is missing is asked for. */
final class Input
{
    public $context;
    private $left = '', $ended = false;
    private $inner;

    public function stream_open($path, $mode, $options, &$opened)
    {
        if (preg_match('~^(madang://input|php://(stdin|fd/0))$~i', $path)) return true;
        stream_wrapper_restore('php');
        $this->inner = @fopen($path, $mode);
        self::take('php');
        return $this->inner !== false;
    }

    public static function take($protocol)
    {
        if (in_array($protocol, stream_get_wrappers(), true)) stream_wrapper_unregister($protocol);
        stream_wrapper_register($protocol, self::class);
    }

    public function stream_read($count)
    {
        if ($this->inner) return fread($this->inner, $count);
        if ($this->left === '') {
            $line = Wire::ask('');
            $this->ended = $line === false;
            $this->left = $this->ended ? '' : $line . "\n";
        }
        $got = substr($this->left, 0, $count);
        $this->left = (string) substr($this->left, strlen($got));
        return $got;
    }

    public function stream_write($data) { return $this->inner ? fwrite($this->inner, $data) : 0; }
    public function stream_eof() { return $this->inner ? feof($this->inner) : $this->ended; }
    public function stream_stat() { return $this->inner ? fstat($this->inner) : []; }
    public function stream_close() { if ($this->inner) fclose($this->inner); }
    public function stream_flush() { return $this->inner ? fflush($this->inner) : true; }
    public function stream_tell() { return $this->inner ? ftell($this->inner) : 0; }
    public function stream_set_option($option, $one, $two) { return false; }
    public function stream_truncate($size) { return $this->inner && ftruncate($this->inner, $size); }
    public function stream_seek($to, $whence)
    {
        return $this->inner && fseek($this->inner, $to, $whence) === 0;
    }
}

/** Functions and classes that *code* would define a second time, which ends PHP. */
function again($code)
{
    if (!function_exists('token_get_all')) return null;
    $tokens = array_values(array_filter(token_get_all('<?php ' . $code), function ($token) {
        return !is_array($token) || !in_array($token[0], [T_WHITESPACE, T_COMMENT, T_DOC_COMMENT]);
    }));
    $depth = 0;
    foreach ($tokens as $i => $token) {
        if ($token === '{' || is_array($token) && in_array($token[0], [T_CURLY_OPEN, T_DOLLAR_OPEN_CURLY_BRACES])) $depth++;
        if ($token === '}') $depth--;
        if ($depth > 0 || !is_array($token)) continue;
        $name = $tokens[$i + (($tokens[$i + 1] ?? null) === '&' ? 2 : 1)] ?? null;
        if (!is_array($name) || $name[0] !== T_STRING) continue;
        $before = $tokens[$i - 1] ?? null;
        if (is_array($before) && in_array($before[0], [T_OBJECT_OPERATOR, T_DOUBLE_COLON, T_NEW])) continue;
        if ($token[0] === T_FUNCTION && function_exists($name[1])
            || in_array($token[0], [T_CLASS, T_INTERFACE, T_TRAIT])
            && (class_exists($name[1], false) || interface_exists($name[1], false) || trait_exists($name[1], false))) {
            return [$name[1], $name[2]];
        }
    }
    return null;
}

function show($value)
{
    if (is_string($value)) return $value;
    if (is_bool($value) || is_float($value) || $value === null) return var_export($value, true);
    return is_scalar($value) ? (string) $value : rtrim(print_r($value, true));
}

function complete($id, $payload)
{
    [$cursor, $code] = explode("\n", $payload, 2);
    preg_match('/^.{0,' . (int) $cursor . '}/su', $code, $before);
    preg_match('/\$?[A-Za-z0-9_\x80-\xff]*$/', $before[0] ?? '', $found);
    $word = $found[0];
    $names = $word !== '' && $word[0] === '$'
        ? array_map(function ($name) { return "\$$name"; }, array_keys($GLOBALS))
        : array_merge(get_defined_functions()['internal'], get_defined_functions()['user'],
            get_declared_classes(), array_keys(get_defined_constants()));
    $names = array_values(array_filter($names, function ($name) use ($word) {
        return strncasecmp($name, $word, strlen($word)) === 0 && strpos($name, 'madang\\') !== 0
            && strpos($name, 'Madang\\') !== 0;
    }));
    sort($names);
    $start = (int) $cursor - preg_match_all('/./su', $word);
    Wire::frame('completions', $id, "$start,$cursor", implode("\n", array_slice($names, 0, 500)));
}

function inspect($id, $payload)
{
    [$cursor, $code] = explode("\n", $payload, 2);
    preg_match('/^.{0,' . (int) $cursor . '}[A-Za-z0-9_]*/su', $code, $before);
    preg_match('/\$?[A-Za-z0-9_\x80-\xff]+$/', $before[0] ?? '', $found);
    $word = $found[0] ?? '';
    $text = '';
    if ($word !== '' && $word[0] === '$' && array_key_exists(substr($word, 1), $GLOBALS)) {
        $value = $GLOBALS[substr($word, 1)];
        $text = (is_object($value) ? get_class($value) : gettype($value)) . "\n" . show($value);
    } elseif ($word !== '' && function_exists($word)) {
        $text = (string) new \ReflectionFunction($word);
    } elseif ($word !== '' && class_exists($word, false)) {
        $text = (string) new \ReflectionClass($word);
    }
    Wire::frame('inspection', $id, $text === '' ? 'none' : 'found', $text);
}

/** *code* with its last expression returned, if it ends with one. */
function with_result($code)
{
    if (!function_exists('token_get_all')) return $code;
    $depth = $offset = $end = 0;
    foreach (token_get_all('<?php ' . $code) as $token) {
        $text = is_array($token) ? $token[1] : $token;
        $offset += strlen($text);
        $depth += substr_count('{([', $text[0]) - (in_array($text, ['}', ')', ']'], true) ? 1 : 0);
        if ($depth === 0 && in_array($text, [';', '}'], true)) $end = $offset - 6;
    }
    $tail = substr($code, $end);
    if (trim($tail) === '') return $code;
    $changed = substr($code, 0, $end) . ' return ' . $tail . "\n;";
    try {
        token_get_all('<?php ' . $changed, TOKEN_PARSE);
        return $changed;
    } catch (\ParseError $error) {
        return $code;
    }
}

/** Serves until there is code to run; that is left in Wire::$code. */
function wait()
{
    while (true) {
        [$op, $id, $payload] = Wire::next();
        if ($op === 'quit') exit(0);
        if ($op === 'complete') complete($id, $payload);
        if ($op === 'inspect') inspect($id, $payload);
        if ($op !== 'run') continue;
        Wire::$cell = $id;
        Wire::frame('begin', $id);
        Wire::$wall = hrtime(true);
        Wire::$cpu = Wire::cpu();
        $code = preg_replace('/^\s*<\?php\b/', '', $payload);
        if (!($twice = again($code))) {
            Wire::$code = with_result($code);
            Wire::$running = true;
            return;
        }
        $text = "PHP can't define $twice[0] again: restart the interpreter.";
        Wire::error($id, 'Error', $text, $twice[1]);
        Wire::done($id, 'error');
    }
}

function succeeded()
{
    if (Wire::$value !== null) Wire::frame('result', Wire::$cell, 'text/plain', show(Wire::$value));
    Wire::$value = null;
    Wire::done(Wire::$cell, 'ok');
}

function failed($caught)
{
    if ($caught instanceof Interrupted) {
        Wire::error(Wire::$cell, 'Interrupted', 'The cell was interrupted.', null);
    } else {
        $line = strpos($caught->getFile(), "eval()'d code") ? $caught->getLine() : null;
        foreach ($caught->getTrace() as $step) {
            if ($line === null && strpos($step['file'] ?? '', "eval()'d code")) $line = $step['line'];
        }
        $trace = preg_replace('/^#\d+ (Standard input code\(|\{main\}).*$/m', '', $caught->getTraceAsString());
        Wire::error(Wire::$cell, get_class($caught), $caught->getMessage(), $line, trim($trace));
    }
    Wire::done(Wire::$cell, 'error');
}

/** After `exit`, or after what PHP can't go on from: then what was defined is still there. */
function ended()
{
    if (!Wire::$running) return;
    $last = error_get_last();
    $fatal = E_ERROR | E_PARSE | E_CORE_ERROR | E_COMPILE_ERROR | E_USER_ERROR;
    if ($last === null || !($last['type'] & $fatal)) {
        Wire::done(Wire::$cell, 'ok');
        return;
    }
    $line = strpos($last['file'], "eval()'d code") ? $last['line'] : null;
    Wire::error(Wire::$cell, 'Fatal', $last['message'], $line);
    Wire::done(Wire::$cell, 'error');
    while (true) {
        wait();
        try {
            Wire::$value = \madang_evaluate();
            succeeded();
        } catch (\Throwable $caught) {
            failed($caught);
        }
    }
}

define('STDOUT', fopen('php://stdout', 'w'));
define('STDERR', fopen('php://stderr', 'w'));
Wire::$in = fopen('php://fd/3', 'r');
Wire::$nonce = getenv('MADANG_NONCE');
putenv('MADANG_NONCE');
unset($_SERVER['MADANG_NONCE'], $_ENV['MADANG_NONCE']);
Input::take('madang');
Input::take('php');
define('STDIN', fopen('madang://input', 'r'));
if (PHP_VERSION_ID >= 80000 && !function_exists('readline')) {
    eval('namespace { function readline($prompt = null) { return \Madang\Wire::ask((string) $prompt); } }');
}
if (function_exists('pcntl_signal')) {
    pcntl_async_signals(true);
    pcntl_signal(SIGINT, function () { if (Wire::$running) throw new Interrupted(); }, false);
}
register_shutdown_function('Madang\ended');
Wire::frame('ready', '-', '-', PHP_VERSION);

}

namespace {

/** Like the loop below, where that has ended: variables are carried over. */
function madang_evaluate()
{
    extract($GLOBALS, EXTR_SKIP | EXTR_REFS);
    $madang = eval(\Madang\Wire::$code);
    foreach (get_defined_vars() as $madang_name => $madang_value) {
        if (strpos($madang_name, 'madang') !== 0) $GLOBALS[$madang_name] = $madang_value;
    }
    return $madang;
}

while (true) {
    \Madang\wait();
    try {
        \Madang\Wire::$value = eval(\Madang\Wire::$code);
        \Madang\succeeded();
    } catch (\Throwable $madang) {
        \Madang\failed($madang);
        unset($madang);
    }
}

}
