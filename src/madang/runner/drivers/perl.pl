# Cells of Perl; the protocol: docs/reference/drivers.md. `my` at the start of a line means `our`,
# so that the next cell has the variable too.
package Madang;
use strict;
use warnings;
use Time::HiRes ();
use IO::Handle ();

our ($nonce, $cell, $running) = (delete $ENV{MADANG_NONCE}, '-', 0);
delete $ENV{DRIVER};
open(our $in, '<&=', 3) or die "descriptor 3: $!";
open(our $out, '>&', \*STDOUT) or die;
open(our $err, '>&', \*STDERR) or die;
binmode($_) for $in, $out, $err;
binmode(STDOUT, ':encoding(UTF-8)');
binmode(STDERR, ':encoding(UTF-8)');
$_->autoflush(1) for \*STDOUT, \*STDERR;

sub frame {
    my ($kind, $id, $what, $text, $to) = @_;
    $text = '' unless defined $text;
    utf8::encode($text) if utf8::is_utf8($text);
    print { $to || $out } "\x1e$nonce $kind $id $what " . length($text) . "\n$text\n";
    ($to || $out)->flush;
}

# Interrupts are let through to us only while code runs or waits.
sub take {
    while (1) {
        my $line = readline($in);
        if (!defined $line) { next if $!{EINTR}; exit 0 }
        my ($op, $id, $size) = split / /, $line;
        my $text = '';
        read($in, $text, $size - length $text, length $text) or last while length $text < $size;
        utf8::decode($text);
        return ($op, $id, $text);
    }
}

sub ask {
    frame('input', $cell, 'prompt', '');
    while (1) {
        my ($op, $id, $text) = take();
        return "$text\n" if $op eq 'input' && $id eq $cell;
        return undef if $op eq 'eof' && $id eq $cell;
        exit 0 if $op eq 'quit';
    }
}

# What standard input is: each line that is missing is asked for.
sub TIEHANDLE { bless {}, shift }
sub READLINE {
    return ask() unless wantarray;
    my @lines;
    while (defined(my $line = ask())) { push @lines, $line }
    return @lines;
}
sub EOF { 0 }
sub FILENO { 0 }
sub CLOSE { 1 }
tie *STDIN, __PACKAGE__;

sub show {
    my @values = @_;
    require Data::Dumper;
    local ($Data::Dumper::Terse, $Data::Dumper::Indent, $Data::Dumper::Sortkeys) = (1, 1, 1);
    my @shown = map { ref $_ ? Data::Dumper::Dumper($_) =~ s/\n\z//r : defined $_ ? "$_" : 'undef' } @values;
    return join ' ', @shown;
}

sub memory {
    open(my $file, '<', '/proc/self/statm') or return 0;
    return (split ' ', readline $file)[1] * 4096;
}

sub run {
    my ($id, $code) = @_;
    $cell = $id;
    frame('begin', $id, '-');
    my ($wall, @cpu) = (Time::HiRes::time(), times);
    $code =~ s/^my(?=\s)/our/mg;
    my @values = do {
        local $SIG{INT} = sub { die "interrupted\n" };
        local $SIG{__WARN__} = sub { print STDERR @_ };
        $running = 1;
        main::madang_evaluate($code);
    };
    my $problem = $@;
    my $status = $problem ne '' || ref $problem ? 'error' : 'ok';
    if ($status eq 'ok') {
        frame('result', $id, 'text/plain', show(@values)) if $code !~ /[;}]\s*\z/ && @values && defined $values[0];
    } elsif ($problem eq "interrupted\n") {
        frame('error', $id, '-', "Interrupted\nThe cell was interrupted.");
    } else {
        my $text = "$problem" =~ s/, <\$in> (?:line|chunk) \d+//gr;
        my ($line) = $text =~ /at cell line (\d+)/;
        my $name = ref $problem || ($text =~ /^syntax error/ ? 'SyntaxError' : 'Error');
        my $first = (split /\n/, $text)[0];
        $first =~ s/ at cell line \d+\.?\z//;
        frame('error', $id, defined $line ? $line : '-', "$name\n$first\n$text");
    }
    STDOUT->flush;
    my @used = times;
    my $cpu = 0;
    $cpu += $used[$_] - $cpu[$_] for 0 .. 3;
    frame('fence', $id, '-', '', $err);
    frame('done', $id, $status, sprintf("wall_us=%d\ncpu_us=%d\nmem_bytes=%d",
        (Time::HiRes::time() - $wall) * 1e6, $cpu * 1e6, memory()));
}

sub complete {
    my ($id, $payload) = @_;
    my ($cursor, $code) = split /\n/, $payload, 2;
    my ($sigil, $word) = substr($code, 0, $cursor) =~ /([\$\@%&]?)(\w*)\z/;
    my $kind = { '$' => 'SCALAR', '@' => 'ARRAY', '%' => 'HASH' }->{$sigil} || 'CODE';
    no strict 'refs';
    my @found = grep { /^\Q$word\E\w*\z/ && !/^madang_/ && defined *{"main::$_"}{$kind} } keys %main::;
    @found = map { "$sigil$_" } sort @found;
    splice @found, 500 if @found > 500;
    my $start = $cursor - length "$sigil$word";
    frame('completions', $id, "$start,$cursor", join "\n", @found);
}

sub inspect {
    my ($id, $payload) = @_;
    my ($cursor, $code) = split /\n/, $payload, 2;
    my ($before) = substr($code, 0, $cursor) =~ /([\$\@%]?\w*)\z/;
    my ($after) = substr($code, $cursor) =~ /\A(\w*)/;
    my $word = "$before$after";
    my @value = $word =~ /\A[\$\@%]\w+\z/ ? do { no strict; eval "package main; $word" } : ();
    return frame('inspection', $id, 'none') unless @value && defined $value[0];
    frame('inspection', $id, 'found', "$word\n" . show(@value));
}

package main;

sub madang_evaluate {
    no strict;
    use utf8;
    return eval "no strict; use utf8; use feature 'say';\n#line 1 \"cell\"\n$_[0]\n";
}

package Madang;

$SIG{INT} = sub { };
frame('ready', '-', '-', sprintf '%vd', $^V);
while (1) {
    my ($op, $id, $text) = take();
    exit 0 if $op eq 'quit';
    run($id, $text) if $op eq 'run';
    complete($id, $text) if $op eq 'complete';
    inspect($id, $text) if $op eq 'inspect';
}
