-- What spend control, receipts and stored answers keep. Admission and settlement write most of it, in their own round trips.

-- What a receipt shows beyond the record itself, and whose budget and whose upstream key it was.
alter table public.usage_records
    add column end_user varchar(256),
    add column byok boolean not null default false,
    add column cache_hit boolean not null default false,
    add column price_basis jsonb,
    add column balance_after_nanos bigint;
comment on column public.usage_records.price_basis is
    'What the hold was made of, nano-dollars as text, without markup: fixed_nanos, output_nanos (one output token), max_price as sent.';
comment on column public.usage_records.balance_after_nanos is 'The account''s credits right after this request was settled.';
comment on column public.usage_records.byok is 'Sent with the user''s own upstream key: metered and limited, not charged.';

alter table public.api_keys_new add column cache_ttl_seconds int check (cache_ttl_seconds between 1 and 86400);
comment on column public.api_keys_new.cache_ttl_seconds is 'Requests of this key use the response cache unless they say otherwise; null: only those that ask.';

-- How much of its budget (percent: 50, 80, 100) a key has been said to have spent in the window.
alter table public.rate_limit_usage add column budget_level smallint not null default 0;

-- Finished answers: of requests with an Idempotency-Key, and of the response cache.
create table public.stored_answers (
    id bigint generated always as identity primary key,
    kind text not null check (kind in ('idempotency', 'cache')),
    user_id bigint not null references public.users (id),
    place text not null check (place ~ '^[0-9a-f]{64}$'),
    fingerprint text not null check (fingerprint ~ '^[0-9a-f]{64}$'),
    request_id uuid not null,
    state text not null check (state in ('running', 'finished')),
    answer text check (length(answer) <= 2000000),
    created_at timestamptz not null default clock_timestamp(),
    expires_at timestamptz not null,
    constraint stored_answers_finished_has_answer check ((state = 'finished') = (answer is not null))
);
comment on table public.stored_answers is
    'Encrypted answers by place: SHA-256 of environment, path and key (idempotency) or of environment, path and canonical body (cache).';
create unique index stored_answers_place_key on public.stored_answers (user_id, kind, place);
comment on index public.stored_answers_place_key is 'Of two requests with one key, one runs.';
create index stored_answers_request_idx on public.stored_answers (request_id);
create index stored_answers_expiry_idx on public.stored_answers (expires_at);
alter table public.stored_answers enable row level security;
revoke all on public.stored_answers from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.stored_answers to service_role;
revoke all on sequence public.stored_answers_id_seq from public, anon, authenticated, service_role;
grant usage, select on sequence public.stored_answers_id_seq to service_role;

-- A user's own upstream key.
create table public.provider_keys (
    user_id bigint primary key references public.users (id),
    encrypted_key text not null check (length(encrypted_key) <= 2000),
    label text not null check (length(label) between 1 and 64),
    is_active boolean not null default true,
    created_at timestamptz not null default clock_timestamp(),
    updated_at timestamptz not null default clock_timestamp()
);
comment on table public.provider_keys is 'Encrypted at rest; `label` is what may be shown of it.';
alter table public.provider_keys enable row level security;
revoke all on public.provider_keys from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.provider_keys to service_role;

-- Budgets of the customers of a user, named by them; '*' is for each who has none of their own.
create table public.end_user_budgets (
    id bigint generated always as identity primary key,
    user_id bigint not null references public.users (id),
    end_user text not null check (length(end_user) between 1 and 256),
    budget_nanos bigint not null check (budget_nanos >= 0),
    budget_window text not null check (budget_window in ('day', 'week', 'month', 'lifetime')),
    created_at timestamptz not null default clock_timestamp(),
    updated_at timestamptz not null default clock_timestamp()
);
create unique index end_user_budgets_name_key on public.end_user_budgets (user_id, end_user);
alter table public.end_user_budgets enable row level security;
revoke all on public.end_user_budgets from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.end_user_budgets to service_role;
revoke all on sequence public.end_user_budgets_id_seq from public, anon, authenticated, service_role;
grant usage, select on sequence public.end_user_budgets_id_seq to service_role;

create table public.end_user_usage (
    user_id bigint not null references public.users (id),
    end_user text not null check (length(end_user) between 1 and 256),
    budget_since timestamptz not null default '-infinity',
    budget_spent_nanos bigint not null default 0,
    budget_held_nanos bigint not null default 0,
    budget_level smallint not null default 0,
    constraint end_user_usage_pkey primary key (user_id, end_user),
    constraint end_user_usage_sound check (least(budget_spent_nanos, budget_held_nanos) >= 0)
) with (fillfactor = 50);
comment on table public.end_user_usage is 'Counters of end users that a budget applies to; locked with their user.';
alter table public.end_user_usage enable row level security;
revoke all on public.end_user_usage from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.end_user_usage to service_role;

-- Soft limits: what was reached, once for each level of each window, and who is to be told.
create table public.budget_events (
    id bigint generated always as identity primary key,
    user_id bigint not null references public.users (id),
    key_id bigint references public.api_keys_new (id),
    end_user text check (length(end_user) between 1 and 256),
    level smallint not null check (level in (50, 80, 100)),
    budget_nanos bigint not null check (budget_nanos >= 0),
    spent_nanos bigint not null check (spent_nanos >= 0),
    budget_window text not null check (budget_window in ('day', 'week', 'month', 'lifetime')),
    window_start timestamptz not null,
    request_id uuid not null,
    created_at timestamptz not null default clock_timestamp(),
    constraint budget_events_subject check ((key_id is null) <> (end_user is null))
);
create index budget_events_user_idx on public.budget_events (user_id, id desc);
alter table public.budget_events enable row level security;
revoke all on public.budget_events from public, anon, authenticated, service_role;
grant select, insert, delete on public.budget_events to service_role;
revoke all on sequence public.budget_events_id_seq from public, anon, authenticated, service_role;
grant usage, select on sequence public.budget_events_id_seq to service_role;

create table public.webhooks (
    id bigint generated always as identity primary key,
    user_id bigint not null references public.users (id),
    url text not null check (length(url) between 9 and 2000),
    encrypted_secret text not null check (length(encrypted_secret) <= 2000),
    is_active boolean not null default true,
    created_at timestamptz not null default clock_timestamp(),
    updated_at timestamptz not null default clock_timestamp()
);
create index webhooks_user_idx on public.webhooks (user_id);
alter table public.webhooks enable row level security;
revoke all on public.webhooks from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.webhooks to service_role;
revoke all on sequence public.webhooks_id_seq from public, anon, authenticated, service_role;
grant usage, select on sequence public.webhooks_id_seq to service_role;

-- The outbox: settlement writes it in the transaction that reaches the level, the sweep sends it.
create table public.webhook_deliveries (
    id bigint generated always as identity primary key,
    event_id bigint not null references public.budget_events (id) on delete cascade,
    webhook_id bigint not null references public.webhooks (id) on delete cascade,
    user_id bigint not null references public.users (id),
    attempts int not null default 0,
    next_attempt_at timestamptz not null default clock_timestamp(),
    delivered_at timestamptz,
    failed_at timestamptz,
    last_status int,
    last_error text check (length(last_error) <= 500),
    created_at timestamptz not null default clock_timestamp(),
    constraint webhook_deliveries_one_end check (delivered_at is null or failed_at is null)
);
create index webhook_deliveries_due_idx on public.webhook_deliveries (next_attempt_at) where delivered_at is null and failed_at is null;
create index webhook_deliveries_user_idx on public.webhook_deliveries (user_id, id desc);
alter table public.webhook_deliveries enable row level security;
revoke all on public.webhook_deliveries from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.webhook_deliveries to service_role;
revoke all on sequence public.webhook_deliveries_id_seq from public, anon, authenticated, service_role;
grant usage, select on sequence public.webhook_deliveries_id_seq to service_role;

create or replace function public.schema_version() returns bigint language sql immutable set search_path = '' as $$
    select 20261124110000::bigint
$$;

notify pgrst, 'reload schema';
